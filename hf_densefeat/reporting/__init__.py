"""What was measured, as tables, pages, pictures and cards."""
