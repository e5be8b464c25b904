"""Objects in Google Cloud Storage and Azure Blob Storage, through the optional library obstore."""
