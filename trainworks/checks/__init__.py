"""What a user can prove of a run file of their own: that resuming is exact, and that the loss is the same however it is
computed."""
