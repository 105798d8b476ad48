"""What a run takes and what it does, before and after it: tables and pictures."""
