"""What tests share: variants, problems, comparisons, and calls for processes of their own."""
