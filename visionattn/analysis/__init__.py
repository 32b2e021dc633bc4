"""Looking inside models: pictures of what they attend to, and pages to look at in a browser."""
from .by_layer import LayerAttention, recorded_by_layer
from .heads import Heads, find_heads, masked_heads
from .importance import Ablation, ablate_heads, gradient_importance
from .measures import Attended, measure_attention
from .pages import png_address, write_page
from .pictures import Routes, Trees, draw_routes, draw_trees, find_routes, find_trees
from .places import Places, token_places
from .prune import inseparable_heads, least_important, load_pruned, prune_heads, pruned_heads, save_pruned

__all__ = [
    "Ablation", "Attended", "Heads", "LayerAttention", "Places", "Routes", "Trees", "ablate_heads", "draw_routes",
    "draw_trees", "find_heads", "find_routes", "find_trees", "gradient_importance", "inseparable_heads",
    "least_important", "load_pruned", "masked_heads", "measure_attention", "png_address", "prune_heads",
    "pruned_heads", "recorded_by_layer", "save_pruned", "token_places", "write_page",
]
