import http.server
import threading

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from eit import hub_access
from eit.errors import UserError
from eit.models.registry import create_model
from eit.weights import load


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_access.prepare_hub.cache_clear()
    yield
    hub_access.prepare_hub.cache_clear()


class NotImplementedHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.parametrize("error", [ConnectionError("no"), TimeoutError("slow"), RuntimeError("another library's")])
def test_a_hub_that_does_not_answer_is_asked_once(online, monkeypatch, error):
    asked = []

    class Session:
        def head(self, *words, **options):
            asked.append(words)
            raise error

    monkeypatch.setattr(hub_access, "get_session", Session)
    for call in (lambda: load.load("hf-hub:me/x"), lambda: create_model("timm/vit_tiny_patch16_224", pretrained=True)):
        with pytest.raises(UserError, match="cannot be reached, and the file is not in its cache; give a local file"):
            call()
    assert len(asked) == 1 and constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_used(online, monkeypatch):
    """Even with an error: then it is the file that is wrong."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotImplementedHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    hub_access.prepare_hub()
    server.shutdown()
    assert not constants.HF_HUB_OFFLINE


def test_reasons_are_one_line(online):
    for error in (LocalEntryNotFoundError("a\nb"), OfflineModeIsEnabled("HF_HUB_OFFLINE"), ValueError("a\nb")):
        reason = hub_access.hub_reason(error)
        assert "\n" not in reason and "HF_HUB_OFFLINE" not in reason
