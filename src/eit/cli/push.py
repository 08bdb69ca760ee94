"""`eit push CKPT --repo USER/NAME`, `--to FOLDER` or `--space FOLDER`."""

import json
import shlex
from typing import Annotated

import typer

from eit.cli.options import Checkpoint, Json, folder_to_write
from eit.cli.output import print_result, program
from eit.errors import UserError
from eit.files import expand_path
from eit.imports import quick_imports


def push(
    checkpoint: Checkpoint,
    repo: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload to this repository of the Hugging Face hub.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", parser=expand_path, help="Write a local folder instead of uploading; needs no network."
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            parser=expand_path,
            help="Write a local folder that a Hugging Face Space runs as it is: the page of eit demo.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="TITLE",
            help="Title of the model card or Space; default: the name of the repository, or of the recipe.",
        ),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="License of the weights, such as apache-2.0; default: the card names none."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private; default: public.")] = False,
    as_json: Json = False,
) -> None:
    """Upload weights to the Hugging Face hub, with a model card.

    \b
    eit push runs/pets --repo USER/pets --license apache-2.0
    eit push runs/pets --to pets-hub
    eit push runs/pets --space pets-space

    timm, transformers and eit predict read the result: hf-hub:USER/pets, or local-dir:FOLDER.
    """
    targets = {"--repo": repo, "--to": to, "--space": space}
    given = [option for option, value in targets.items() if value is not None]
    if len(given) != 1:
        said = f"{', '.join(given)} were given" if given else "none was given"
        raise UserError(f"give one of --repo USER/NAME, --to FOLDER and --space FOLDER; {said}")
    if private and repo is None:
        raise UserError(f"--private is for --repo; leave it out with {given[0]} {targets[given[0]]}")
    with quick_imports(freeze=True):
        from eit.export import hub

    if space is not None:
        files = hub.write_space(checkpoint, folder_to_write(space, "--space"), name, license_)
        quoted = shlex.quote(space)
        text = f"{space}: {', '.join(str(file.relative_to(space)) for file in files)}\n"
        text += f"next: python {shlex.quote(f'{space}/app.py')}    hf upload USER/NAME {quoted} . --repo-type space"
        print_result(dict(folder=space, files=[str(file) for file in files]), as_json, text)
    elif to is not None:
        files = hub.write_folder(checkpoint, folder_to_write(to, "--to"), name, license_)
        text = f"{to}: {', '.join(file.name for file in files)}\n"
        address = json.dumps(f"local-dir:{to}", ensure_ascii=False)  # quoted for Python
        text += f"next: timm.create_model({address}, pretrained=True), after import eit"
        print_result(dict(folder=to, files=[str(file) for file in files]), as_json, text)
    elif repo is not None:
        address = hub.push(checkpoint, repo, name, license_, private)
        text = f"{address}\nnext: {program()} predict hf-hub:{repo} IMAGE..."
        print_result(dict(address=address), as_json, text)
