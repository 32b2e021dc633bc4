"""Looking inside models: pictures of what they attend to, and pages to look at in a browser."""
from .by_layer import LayerAttention, recorded_by_layer
from .heads import Heads, find_heads, masked_heads
from .pages import png_address, write_page
from .pictures import Routes, Trees, draw_routes, draw_trees, find_routes, find_trees
from .places import Places, token_places

__all__ = [
    "Heads", "LayerAttention", "Places", "Routes", "Trees", "draw_routes", "draw_trees", "find_heads", "find_routes",
    "find_trees", "masked_heads", "png_address", "recorded_by_layer", "token_places", "write_page",
]
