"""One partition per fine-tune and one per imported checkpoint, added when it arrives."""

import dagster as dg

FINE_TUNES = dg.DynamicPartitionsDefinition(name="fine_tunes")
IMPORTS = dg.DynamicPartitionsDefinition(name="imports")
