"""Many transfers at once: studies, their table, the demo."""
