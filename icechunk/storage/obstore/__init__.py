"""Objects in Google Cloud Storage and Azure Blob Storage, through the optional library obstore.

Not here: S3, which needs no optional library (`storage.s3`).
"""
