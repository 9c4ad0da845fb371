"""Recording under other people's training loops, one module for each; none is imported unless it is used."""
