"""What a user names: one class per task over one template."""
