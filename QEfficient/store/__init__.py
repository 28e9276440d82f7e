"""The content-addressed cache of exports and packages."""
