"""Tool calls in the text of answers: one small parser for each format that models write."""
