"""The network, its loss, its export."""
