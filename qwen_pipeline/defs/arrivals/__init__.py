"""Arrivals in the two inboxes: the sensors, their cursor, and the asset that shows what is quarantined."""
