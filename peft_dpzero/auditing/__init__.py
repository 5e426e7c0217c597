"""Auditing: what an attacker who sees every release can prove about ε, from one training run."""
