"""Token-aware average pooling: beside the authors' numbers and its definition."""
import pytest
import torch
import torch.nn.functional as F

from tests import golden
from visionattn.layers import TokenAwarePooling


@pytest.mark.parametrize("case", golden.load("tapadl_tap")["cases"], ids=lambda case: f"{case['num_scales']}")
@torch.no_grad()
def test_golden(case):
    layer = TokenAwarePooling(case["dim"], case["num_scales"], dtype=torch.float64).eval()
    layer.load_state_dict({
        key.replace("dilation_predictor.proj", "predictor"): golden.fill(key, shape)
        for key, shape in case["state_dict"] if not key.endswith("num_batches_tracked")}, strict=False)
    x = golden.random(case["x"]["seed"], case["x"]["shape"])
    weights = layer.predictor(x).softmax(dim=1).permute(0, 2, 3, 1)[:, None]
    golden.assert_matches(weights, case["weights_B1HWK_summary"], 1e-12)
    out = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    golden.assert_matches(out, case["out_summary"], 1e-12)
    if "out" in case:
        torch.testing.assert_close(out, torch.tensor(case["out"], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_definition():
    """A mean over the dilated neighborhood is average pooling of what lies so far apart; of one scale, nothing."""
    layer = TokenAwarePooling(2, 3, dtype=torch.float64).eval()
    torch.nn.init.zeros_(layer.predictor[2].weight)  # all scales alike
    x = torch.randn(2, 2, 6, 9, dtype=torch.float64)
    expected = x.clone()
    for k in (1, 2):
        kernel = torch.full((2, 1, 3, 3), 1 / 9, dtype=torch.float64)
        expected += F.conv2d(x, kernel, padding=k, dilation=k, groups=2)
    torch.testing.assert_close(layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), expected / 3)
    assert torch.equal(TokenAwarePooling(9, 1, dtype=torch.float64).eval()(x), x)


def test_no_scale():
    with pytest.raises(ValueError, match="num_scales must be 1 or more, got 0"):
        TokenAwarePooling(4, 0)
