"""Which run comes next, starting it, and the engines that run many."""
