"""Looking inside models: pictures of what they attend to, and pages to look at in a browser."""
from .pages import png_address, write_page
from .pictures import Routes, Trees, draw_routes, draw_trees, find_routes, find_trees

__all__ = [
    "Routes", "Trees", "draw_routes", "draw_trees", "find_routes", "find_trees", "png_address", "write_page",
]
