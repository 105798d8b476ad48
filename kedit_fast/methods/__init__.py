"""Methods as data: recipes name strategies, presets hold published hyper-parameters."""
