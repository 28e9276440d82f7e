"""What a run minimises: one small class per method, all on the one compiled step."""
