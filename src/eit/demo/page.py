"""The page itself: built with Gradio, and served. Gradio is imported when a page is opened, which takes seconds."""

import errno
import ipaddress
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch

from eit.console import say
from eit.data.images import TooManyPixels, UnreadableImage, decode
from eit.demo.examples import write_examples
from eit.demo.explanation import TOP, explain, to_html
from eit.errors import UserError, printable, shorten
from eit.files import temporary_folder
from eit.inference.exported_models import import_runtime, load
from eit.weights.card import Card
from eit.weights.load import FOR, INCLUDED

PORTS = 7860, 7959  # tried one after the other if none is given
MOST_BYTES = 20 << 20  # of an upload
MOST_MODELS = 4  # next to each other
LOCAL = "127.0.0.1"


class Refused(UserError):
    """A picture that is not read; the line is for the person at the page."""


def serve(
    names: Sequence[str] | Mapping[str, str] = (),
    host: str = LOCAL,
    port: int | None = None,
    max_pixels: int | None = None,
    device: str | torch.device = "cpu",
) -> NoReturn:
    """Serve the page of these weights until Ctrl-C or SIGTERM ends the process; its files are removed then.

    Args:
        names: weights, next to each other, or title -> weights; without any, those that are included, one at a time.
        host: the address to listen at.
        port: default: the first free one from 7860 on.
        max_pixels: pictures of more pixels are refused; default: the limit of each run.
        device: of the models.

    Raises:
        UserError: Gradio is not installed, weights cannot be loaded, or the port is taken.
    """
    with temporary_folder() as folder:

        def stop(number: int, _: Any) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            os.write(2, b"eit: interrupted\n")
            os._exit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        with open_page(names, folder, host, port, max_pixels, device) as address:
            print(f"{address}  (Ctrl-C ends it)", flush=True)
            if not _is_local(host):
                say(f"--host {host}: everyone who can reach this machine can use the page; it asks for no password")
            while True:
                threading.Event().wait()


@contextmanager
def open_page(
    names: Sequence[str] | Mapping[str, str],
    folder: Path,
    host: str = LOCAL,
    port: int | None = None,
    max_pixels: int | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[str]:
    """The address of a page that is served while the context is open, with all of its files in `folder`."""
    if len(names) > MOST_MODELS:
        raise UserError(f"{len(names)} models: at most {MOST_MODELS} are shown next to each other")
    _check_address(host, port)
    environment = dict(GRADIO_TEMP_DIR=str(folder), GRADIO_ANALYTICS_ENABLED="False")
    environment |= dict(MPLBACKEND="agg", MPLCONFIGDIR=str(folder))  # otherwise it looks for fonts, and keeps a list
    for name in ("no_proxy", "NO_PROXY"):  # a proxy would be asked for the page's own address
        environment[name] = ",".join(filter(None, (os.environ.get(name), LOCAL, "localhost")))
    side_by_side = bool(names)
    titled = (
        names
        if isinstance(names, Mapping)
        else {name: name for name in names or [name for name in FOR if name in INCLUDED]}
    )
    models = {title: load(name).to(device) for title, name in titled.items()}
    with _environment(environment):
        import_runtime("gradio", "eit demo", "demo")
        page = _build(models, side_by_side, folder, max_pixels, _is_local(host))
        try:
            _, address, _ = page.queue(max_size=64).launch(
                server_name=host,
                server_port=port,
                max_file_size=MOST_BYTES,
                share=False,
                inline=False,
                quiet=True,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                footer_links=[],
                prevent_thread_lock=True,
                theme=_theme(),
                css=_text("page.css"),
                app_kwargs=dict(middleware=_middleware()),
            )
        except OSError:  # none is free
            raise UserError(f"the ports {PORTS[0]} to {PORTS[1]} of {host} are taken: give another --port") from None
        try:
            yield address
        finally:
            page.close(verbose=False)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_address(host: str, port: int | None) -> None:
    """Raise a UserError if nothing can listen there, before anything is loaded."""
    try:
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} of {host} is taken: give another one") from None
        what = f"--host {host}" + (f" --port {port}" if port else "")
        raise UserError(f"{what}: {error.strerror}; give an address of this machine, such as {LOCAL}") from None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _text(name: str) -> str:
    return resources.files("eit.demo").joinpath(name).read_text(encoding="utf-8")


def _theme() -> Any:
    """Gradio's, with the fonts of the reader's system, so that nothing is loaded from elsewhere."""
    import gradio

    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


# -- The page ---------------------------------------------------------------------------------------------------------


def _build(models: dict[str, Any], side_by_side: bool, folder: Path, max_pixels: int | None, local: bool) -> Any:
    """The page as Gradio's Blocks: a picture on the left, a column for each model on the right.

    If the models are not side by side, there is one column, and a choice of its model.
    """
    import gradio as gr

    names = list(models)
    title, examples = write_examples(models[names[0]], folder, own=local)

    def show(value: Any, chosen: str | None) -> list[Any]:
        """The outputs for a picture, as the page sends it: status, picture, then labels and layers of each column."""
        columns = names if side_by_side else [chosen or names[0]]
        if value is None:
            return ["", None, *[None, ""] * len(columns)]
        outputs: list[Any] = []
        try:
            for name in columns:
                if name not in models:
                    raise Refused(f"{shorten(name, 60)} is none of the models here: {', '.join(names)}")
                outputs += _answer(models[name], value, folder, max_pixels)
        except UserError as error:
            return [_alert(str(error)), None, *[None, ""] * len(columns)]
        return ["", value, *outputs]

    def show_drawing(chosen: str | None, event: gr.EventData) -> list[Any]:
        return show(dict(path=event.path, orig_name="the drawing"), chosen)

    with gr.Blocks(title="eit demo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        private = " It stays on this machine." if local else ""
        with gr.Column(elem_classes="eit-page"):
            gr.HTML(
                "<h1>What a vision transformer sees</h1>"
                f"<p>Drop a picture, take one with the camera, draw, or pick an example.{private}</p>"
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    with gr.Tab("Picture"):
                        photo = gr.Image(
                            sources=["upload", "webcam", "clipboard"], type="filepath", label="Picture", height=280
                        )
                        gr.Examples([[str(file)] for file in examples], [photo], label=title)
                    with gr.Tab("Draw"):
                        board = gr.HTML(html_template=_text("board.html"), js_on_load=_text("board.js"))
                    status = gr.HTML()
                    choice = gr.Radio(names, value=names[0], label="Model", visible=not side_by_side and len(names) > 1)
                outputs: list[Any] = []
                for name in names if side_by_side else names[:1]:
                    with gr.Column(scale=3, min_width=300):
                        if side_by_side or len(names) == 1:
                            gr.HTML(f"<h2>{escape(shorten(name, 60))}</h2><p>{escape(_describe(models[name]))}</p>")
                        outputs += [gr.Label(num_top_classes=TOP, label=f"Top {TOP}"), gr.HTML()]
            last = gr.State()  # the picture that is shown
            one = dict(concurrency_id="model", concurrency_limit=1, show_progress="minimal", trigger_mode="always_last")
            results = [status, last, *outputs]
            _refuse_addresses(photo)
            photo.change(show, [photo, choice], results, preprocess=False, api_name="predict", **one)
            board.submit(show_drawing, [choice], results, api_visibility="private", **one)
            choice.input(show, [last, choice], results, api_visibility="private", **one)
    return page


def _answer(model: Any, value: Any, folder: Path, max_pixels: int | None) -> tuple[dict[str, float], str]:
    """What Gradio's label shows, and the layers as HTML."""
    explanation = explain(model, read_picture(value, model.card, folder, max_pixels))
    shown: dict[str, float] = {}
    for label, probability in explanation.labels:
        name = shorten(label, 60)
        shown[name if name not in shown else f"{name} ({len(shown) + 1})"] = probability
    return shown, to_html(explanation)


def read_picture(value: Any, card: Any, folder: Path, max_pixels: int | None) -> Any:
    """The decoded picture of what a browser sent: the description of a file that was uploaded into `folder`.

    Raises:
        Refused: it is not an uploaded file, has too many bytes or pixels, or cannot be decoded.
    """
    path, name = (value.get(key) if isinstance(value, dict) else None for key in ("path", "orig_name"))
    if not isinstance(path, str) or not (file := Path(path).resolve()).is_relative_to(folder.resolve()):
        raise Refused("upload a picture: other files and addresses are not read")
    name = shorten(name, 60) if isinstance(name, str) and name else "the picture"
    if not file.is_file():
        raise Refused(f"{name} is not here any more: upload it again")
    if file.stat().st_size > MOST_BYTES:
        raise Refused(f"{name} has more than {MOST_BYTES >> 20} MiB")
    limit = max_pixels or card.max_pixels
    try:
        return decode(file, card.in_chans, limit, name, pixel_range=card.pixel_range)
    except TooManyPixels:
        raise Refused(f"{name} has more than {limit:,} pixels, which is the most that is read here") from None
    except UnreadableImage as error:
        raise Refused(str(error)) from None


def _alert(text: str) -> str:
    return f'<p role="alert">{escape(printable(text))}</p>'


def _describe(model: Any) -> str:
    card: Card = model.card
    family = card.arguments.get("family", "eit")
    name = card.model if family == "eit" else f"{family}/{card.model}"
    size = sum(p.numel() for p in model.parameters())
    parameters = f", {size:,} parameters" if size else ""
    return f"{name}{parameters}, {card.size}x{card.size} pixels, {len(card.classes)} classes"


def _refuse_addresses(photo: Any) -> None:
    """Let the page read uploads alone: Gradio would fetch a picture from an address that a client names."""
    move = photo.async_move_resource_to_block_cache

    async def move_upload(file: Any) -> Any:
        import gradio

        if file is None or "://" in str(file):
            raise gradio.Error("upload a picture: addresses are not read", print_exception=False)
        return await move(file)

    photo.async_move_resource_to_block_cache = move_upload


# -- Limits -----------------------------------------------------------------------------------------------------------


def _middleware() -> list[Any]:
    from starlette.middleware import Middleware

    return [Middleware(LimitBody, most=MOST_BYTES + (1 << 20))]


class LimitBody:
    """Refuses requests with a body of more than `most` bytes; Gradio limits those of uploaded files alone."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        received = 0

        async def count() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return dict(type="http.disconnect") if received > self.most else message

        sizes = [value for name, value in scope.get("headers", ()) if name == b"content-length"]
        if sizes and (not sizes[0].isdigit() or int(sizes[0]) > self.most):
            await send(dict(type="http.response.start", status=413, headers=[(b"content-type", b"text/plain")]))
            await send(dict(type="http.response.body", body=f"more than {MOST_BYTES >> 20} MiB".encode()))
            return
        await self.app(scope, count, send)
