"""The fault plan: kill, signal, damage, fill, lock, corrupt, and compare bit by bit."""
