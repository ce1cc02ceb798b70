"""What an adversary may do: the threat model, the attacks, and what runs them. Pure functions."""

__all__ = ['apgd', 'attack', 'driver', 'fab', 'first_order', 'registry', 'square', 'threat_model']
