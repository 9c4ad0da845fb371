"""Views of a run for a notebook. pandas and matplotlib are imported only when they are needed."""
