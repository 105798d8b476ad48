"""Patches: edits as files. `patch` holds and applies them, `checkpoint` on disk, `lora` exports them to peft."""
