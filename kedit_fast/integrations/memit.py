"""The memit repository: functions with its signatures, for `rome.apply_rome_to_model`, `memit.apply_memit_to_model`.

Values that it kept (`cache_template`, npz with v_star) and its statistics (`{stats_dir}/{model}/{data set}_stats`) are
read as they are, so a run that was begun there goes on here. Statistics that are not there are computed where a text is
configured (`framework_statistics`). What its ROME keeps (`--use_cache`) is not used: those files hold for the weights
that they were made on, and do not say which.
"""

from __future__ import annotations

from kedit_fast.integrations import sessions

apply_memit_to_model = sessions.function("memit", "apply_memit_to_model", whole_name=True)
apply_rome_to_model = sessions.function("rome", "apply_rome_to_model", whole_name=True)
