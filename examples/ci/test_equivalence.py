"""Three lines that keep a model and its export equal; run by pytest."""

import pytest


@pytest.mark.equivalence(model="net.py:build")  # and its fused form
@pytest.mark.equivalence(model="net.py:build", candidate="net.onnx")
def test_what_is_shipped(): ...
