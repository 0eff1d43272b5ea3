"""What a cluster will need, before it is there."""
