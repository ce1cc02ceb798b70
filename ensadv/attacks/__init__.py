"""What an adversary may do: the threat model, the attacks, and what runs them. Pure functions."""

__all__ = ['attack', 'driver', 'first_order', 'registry', 'threat_model']
