"""Pictures of routes."""
import pytest
import timm
import torch

from visionattn.analysis import draw_routes, draw_trees, find_routes, find_trees
from visionattn.layers import BiLevelRoutingAttention, attention_maps


@pytest.mark.parametrize(("name", "options"), [
    ("test_biformer", {}), ("biformer_stl_nchw", {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128)})])
@pytest.mark.parametrize("size", [(96, 96), (70, 101)])
def test_routes_are_those_that_the_layer_takes(name, options, size):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).train()
    layers = [module for module in model.modules() if isinstance(module, BiLevelRoutingAttention)]
    images = torch.randn(2, 3, *size)
    for number in (0, -1):
        routes = find_routes(model, images, number)
        regions = routes.grid[0] * routes.grid[1]
        assert routes.table.shape == (2, regions, min(layers[number].topk, regions))
        assert routes.table.max() < regions
        # The grid covers the image, and not more than padding it explains.
        for cells, cell, length in zip(routes.grid, routes.region, size, strict=True):
            assert cells * cell >= length - 32
    assert model.training
    with pytest.raises(ValueError, match="there is no layer 99"):
        find_routes(model, images, 99)


def test_models_without_routes_are_refused():
    with pytest.raises(ValueError, match="has 0 layers of bi-level routing attention"):
        find_routes(timm.create_model("test_dinat"), torch.randn(1, 3, 64, 64))


def test_picture(tmp_path):
    """The tint is where the best-ranked region is, and nowhere that was not routed to."""
    torch.manual_seed(0)
    model = timm.create_model("test_biformer", num_classes=3)
    draw_routes(model, torch.rand(3, 3, 64, 64), tmp_path / "new" / "routes.png", ["a", "b", "c"], layer=0)
    from matplotlib.image import imread

    picture = imread(tmp_path / "new" / "routes.png")[..., :3]
    spread = picture.max(axis=-1) - picture.min(axis=-1)
    assert (spread > 0.3).mean() > 0.01  # coloured, on a grey image
    assert (spread < 0.05).mean() > 0.2


@pytest.mark.parametrize("name", ["test_dependency_vit", "test_dependency_vit_lite"])
def test_trees_are_trees_of_messages(name):
    """From every patch one comes to the root, that which receives most; parents are those of a greedily grown tree."""
    torch.manual_seed(0)
    model, images = timm.create_model(name).train(), torch.randn(2, 3, 40, 64)
    trees = find_trees(model, images)
    assert (trees.grid, trees.patch) == ((5, 8), (8, 8))
    assert model.training
    with torch.no_grad(), attention_maps(model.eval()) as maps:
        model(images)
    sent = sum(found.sum(1) for found in maps if found.shape[2] == 40).mT  # before tokens are pruned
    for image in range(2):
        off_diagonal = sent[image] * (1 - torch.eye(40))
        parents, root = trees.parents[image], off_diagonal.sum(0).argmax()
        assert parents[root] == root
        place = torch.arange(40)
        for _ in range(40):
            place = parents[place]
        assert (place == root).all()
        inside, children = {int(root)}, set(range(40)) - {int(root)}
        while children:
            best = max(children, key=lambda child: max(off_diagonal[child, parent] for parent in inside))
            assert trees.mass[image, best] == off_diagonal[best, parents[best]]
            assert trees.mass[image, best] == max(off_diagonal[best, parent] for parent in inside)
            inside.add(best)
            children.remove(best)


def test_models_without_messages_are_refused():
    with pytest.raises(ValueError, match="has no reversed attention"):
        find_trees(timm.create_model("test_dinat"), torch.randn(1, 3, 64, 64))


def test_picture_of_trees(tmp_path):
    torch.manual_seed(0)
    draw_trees(timm.create_model("test_dependency_vit"), torch.rand(2, 3, 64, 64), tmp_path / "trees.png", ["a", "b"])
    from matplotlib.image import imread

    picture = imread(tmp_path / "trees.png")[..., :3]
    spread = picture.max(axis=-1) - picture.min(axis=-1)
    assert (spread > 0.3).mean() > 0.02  # coloured lines, on a grey image
    assert (spread < 0.05).mean() > 0.3
