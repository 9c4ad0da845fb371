"""What a run shows in a notebook: a summary, data frames, pictures. Imports pandas and matplotlib only when asked for them."""
