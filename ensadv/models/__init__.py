"""Network architectures: flax modules from images [B, H, W, C] in [0, 1] to logits [B, classes]."""
