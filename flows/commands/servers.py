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
    database: Annotated[
        str | None,
        typer.Option(
            envvar="D3PO_DATABASE",
            help="PostgreSQL for Prefect and MLflow, postgresql://user@host:port/; local: the data folder; by default "
            "the one used last. Others on this machine see a password in a command line: set PGPASSWORD instead",
        ),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(
            envvar="D3PO_ARTIFACTS",
            help="Where MLflow keeps files, s3://bucket/prefix; local: the data folder; by default the place used last",
        ),
    ] = None,
    anew: Annotated[
        bool, typer.Option("--anew", help="Leave behind what the servers kept until now in another database or bucket")
    ] = False,
) -> None:
    """Start Prefect's server and worker, MLflow and the labelling page on 127.0.0.1; register the deployments."""
    from d3po.flows import servers

    print("\n".join(servers.up(prefect_port, mlflow_port, label_port, nightly or (), database, artifacts, anew)))


def down() -> None:
    """Stop everything that ``d3po up`` started."""
    from d3po.flows import servers

    print("\n".join([*servers.down(), *servers.lost_servers()]))


def status() -> None:
    """Show which servers are running, and which rounds wait for people."""
    from d3po.flows import servers
    from d3po.flows.page_links import waiting_lines

    print("\n".join([*servers.status(), *servers.lost_servers(), *waiting_lines()]))
