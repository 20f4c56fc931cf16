"""Releases of a product: candidate and production, approval, promotion, rollback, and delivery to targets."""
