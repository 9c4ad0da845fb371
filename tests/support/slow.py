"""Files of tests that take long."""

# They take other processes, a browser, a cluster, a site, trainers or many seconds; the longest is
# first. They are begun before all others, or one of them would be waited for alone; and `make
# quick` leaves them out.
SLOW = (
    "test_crash",
    "test_report_in_browser",
    "test_object_stores",
    "test_hostile_runs",
    "test_transformers",
    "test_site",
    "test_ranks",
    "test_memory",
    "test_schedulers",
    "test_lightning",
    "test_notebook",
    "test_exact",
    "test_trainers_document",
    "test_checkpointing",
    "test_random_models",
    "test_parquet_document",
    "test_archive",
    "test_golden",
    "test_pipelines",
    "test_evaluate",
    "test_retrainer",
    "test_cleaning",
    "test_probe",
    "test_peers",
    "test_leftovers",
    "test_state",
    "test_streams",
    "test_bad_input",
    "test_export_memory",
)
