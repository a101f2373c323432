"""Check the bucket in which MLflow's server keeps artefacts."""

from d3po.flows.server_stores import Stores
from d3po_core.errors import D3POError

PROBE = "d3po-up-was-here"
SECONDS = 10
LOGIN = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, then type `d3po up` again"


def require_bucket(stores: Stores) -> None:
    """Write and remove a small object where MLflow's artefacts will be; nothing if they stay in the data folder.

    Raises:
        D3POError: the object store does not answer, or refuses us.
    """
    if "artifacts" not in stores:
        return
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    where, endpoint = stores["artifacts"], stores.get("endpoint")
    bucket, _, prefix = where.removeprefix("s3://").partition("/")
    key = f"{prefix}/{PROBE}".lstrip("/")
    patience = Config(connect_timeout=SECONDS, read_timeout=SECONDS, retries={"total_max_attempts": 2})
    try:
        client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=patience)
        client.put_object(Bucket=bucket, Key=key, Body=b"")
        client.delete_object(Bucket=bucket, Key=key)
    except (NoCredentialsError, PartialCredentialsError):
        raise D3POError(f"--artifacts {where}: no credentials for the object store; {LOGIN}") from None
    except ClientError as error:
        raise D3POError(_refused(where, bucket, endpoint, error.response.get("Error", {}))) from None
    except (BotoCoreError, ValueError) as error:
        at = endpoint or "Amazon's S3; for another server, set AWS_ENDPOINT_URL_S3 to its address"
        raise D3POError(f"--artifacts {where}: no answer ({_said(error)}) from {at}") from None


def _refused(where: str, bucket: str, endpoint: str | None, said: dict[str, str]) -> str:
    code = said.get("Code", "")
    if code in ("NoSuchBucket", "404"):
        at = f" --endpoint-url {endpoint}" if endpoint else ""
        return f"--artifacts {where}: there is no bucket {bucket}; create it: aws{at} s3 mb s3://{bucket}"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return f"--artifacts {where}: the object store does not accept our credentials ({code}); {LOGIN}"
    return (
        f"--artifacts {where}: the object store refuses to write ({code}: {said.get('Message', '')[:200]}); our key "
        "needs s3:PutObject, s3:GetObject, s3:DeleteObject and s3:ListBucket there"
    )


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
