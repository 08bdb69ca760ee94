"""`eit push CKPT --repo USER/NAME` or `--to FOLDER`."""

import json
from typing import Annotated

import typer

from eit.cli.options import Checkpoint, Json, folder_to_write
from eit.cli.output import print_result, program
from eit.errors import UserError
from eit.files import expand_path


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
    name: Annotated[
        str | None,
        typer.Option(
            metavar="TITLE",
            help="Title of the model card; default: the name of the repository; with --to, of the recipe.",
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

    eit push runs/pets --repo USER/pets --license apache-2.0

    timm, transformers and eit predict read the result: hf-hub:USER/pets, or local-dir:FOLDER.
    """
    if (repo is None) == (to is None):
        given = "both were given" if repo else "none was given"
        raise UserError(f"give --repo USER/NAME, or --to FOLDER; {given}")
    if to is not None and private:
        raise UserError(f"--private is for --repo; leave it out with --to {to}")
    from eit.export import hub

    if to is not None:
        files = hub.write_folder(checkpoint, folder_to_write(to, "--to"), name, license_)
        text = f"{to}: {', '.join(file.name for file in files)}\n"
        address = json.dumps(f"local-dir:{to}", ensure_ascii=False)  # quoted for Python
        text += f"next: timm.create_model({address}, pretrained=True), after import eit"
        print_result(dict(folder=to, files=[str(file) for file in files]), as_json, text)
    elif repo is not None:
        address = hub.push(checkpoint, repo, name, license_, private)
        text = f"{address}\nnext: {program()} predict hf-hub:{repo} IMAGE..."
        print_result(dict(address=address), as_json, text)
