"""Commands for operators: doctor, metrics, notify, releases, retention."""
