"""One partition per fine-tune, added when it arrives."""

import dagster as dg

FINE_TUNES = dg.DynamicPartitionsDefinition(name="fine_tunes")
