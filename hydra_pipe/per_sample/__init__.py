"""From a pass to the gradients of its samples: layer rules, node rules and what they yield, before anything is written."""
