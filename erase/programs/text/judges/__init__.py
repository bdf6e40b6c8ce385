"""Who says whether images show what is forgotten: one file a judge; `erase.programs.text.judge` chooses."""
