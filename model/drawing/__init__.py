"""Pages and charts that need nothing from anywhere else: HTML by construction, SVG inside it."""
