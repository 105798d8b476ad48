"""What every room uses and knows no model: files, texts, processes, torch's settings, free memory, figures."""
