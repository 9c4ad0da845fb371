"""Recording under other people's training loops: a module for each, imported only when used."""
