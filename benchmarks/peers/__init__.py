"""The benchmark side by side: one worker process per engine, and the harness that lets them take turns."""
