"""`python -m kedit_fast.methods` prints the tables of this room's page."""

from __future__ import annotations

from kedit_fast.methods.tables import hparams_table, methods_table, presets_table, tuning_table

if __name__ == "__main__":
    print(methods_table(), tuning_table(), hparams_table(), presets_table(), sep="\n\n")
