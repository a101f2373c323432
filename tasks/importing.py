"""Import people's judgements as a task."""

from prefect import task

from d3po_core.judgement_files.importing import import_file

import_judgement_file = task(name="import judgements", persist_result=False)(import_file)
