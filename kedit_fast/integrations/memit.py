"""The memit repository: functions with its signatures, for `rome.apply_rome_to_model`, `memit.apply_memit_to_model`.

Its statistics (`{stats_dir}/{model}/{data set}_stats`) and its values (`cache_template`, npz with v_star) are read as
they are, so a run that was begun there continues here. Missing statistics are computed where a text is configured
(`framework_statistics`). The cache of its ROME (`--use_cache`) is not used: those files belong to the weights they were
made with, and do not say which.
"""

from __future__ import annotations

from kedit_fast.integrations.signatures import memit_function

apply_memit_to_model = memit_function("memit", "apply_memit_to_model", whole_name=True)
apply_rome_to_model = memit_function("rome", "apply_rome_to_model", whole_name=True)
