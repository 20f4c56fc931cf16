"""Dynamic partitions: one per fine-tune and one per imported checkpoint, added when its upload is found."""

import dagster as dg

FINE_TUNES = dg.DynamicPartitionsDefinition(name="fine_tunes")
IMPORTS = dg.DynamicPartitionsDefinition(name="imports")
