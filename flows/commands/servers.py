"""The commands up, down and status: the servers behind the deployments."""

from typing import Annotated

import typer


def up(
    prefect_port: Annotated[
        int | None, typer.Option(help="Port of the Prefect server; by default the one used last, at first 4200")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(help="Port of the MLflow server; by default the one used last, at first 5000")
    ] = None,
    label_port: Annotated[
        int | None, typer.Option(help="Port of the labelling page; by default the one used last, at first 8700")
    ] = None,
    nightly: Annotated[
        list[str] | None, typer.Option(help="Also run this deployment every night, e.g. round; may be repeated")
    ] = None,
) -> None:
    """Start Prefect's server and worker, MLflow and the labelling page on 127.0.0.1; register the deployments."""
    from d3po.flows import servers

    print("\n".join(servers.up(prefect_port, mlflow_port, label_port, nightly or ())))


def down() -> None:
    """Stop everything that ``d3po up`` started."""
    from d3po.flows import servers

    print("\n".join([*servers.down(), *servers.lost_servers()]))


def status() -> None:
    """Show which servers are running, and which rounds wait for people."""
    from d3po.flows import servers
    from d3po.flows.page_links import waiting_lines

    print("\n".join([*servers.status(), *servers.lost_servers(), *waiting_lines()]))
