//! The requirements for topics and keyspace. `init` creates them from this description, and `init` and `run` compare
//! existing ones with it. Pure.

use common::contracts::topics::{
    CONTROL_RETENTION_MS, DEAD_LETTER_RETENTION_MS, SEGMENT_MS, TOPIC_RETENTION_MS, dead_letter_topic,
};
use common::runtime::kafka::MAX_MESSAGE_BYTES;
use std::collections::BTreeMap;

/// Number of replicas, and how many of them must have a record before Kafka acknowledges it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replicas {
    /// Replicas of each topic partition and of each row.
    pub factor: i32,
    /// `min.insync.replicas` of the topics.
    pub min_insync: i32,
}

impl Replicas {
    /// Default for `min.insync.replicas`: half of the replicas, rounded up. With three or more replicas, writes
    /// continue while one broker is down.
    pub fn default_min_insync(factor: i32) -> i32 {
        (factor + 1) / 2
    }
}

/// How a topic setting is compared. The value -1 means unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Exactly,
    AtMost,
    AtLeast,
}

/// A required setting of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Name of the setting in Kafka.
    pub name: &'static str,
    /// The value that `init` sets, and the bound to compare with.
    pub value: String,
    rule: Rule,
    /// Why the setting is required, for the error message.
    why: &'static str,
}

/// The requirements for one topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicContract {
    /// Name of the topic.
    pub name: String,
    /// Number of partitions to create. Unused in the contracts of [`needed_to_run`].
    pub partitions: i32,
    /// Required settings.
    pub settings: Vec<Setting>,
}

/// A topic as Kafka describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FoundTopic {
    /// Smallest number of replicas of any partition.
    pub factor: i32,
    /// Setting name → value.
    pub settings: BTreeMap<String, String>,
}

fn setting(name: &'static str, rule: Rule, value: impl ToString, why: &'static str) -> Setting {
    Setting { name, rule, value: value.to_string(), why }
}

fn not_compacted() -> Setting {
    let why = "compaction may remove records that are unprocessed or that a recovery needs";
    setting("cleanup.policy", Rule::Exactly, "delete", why)
}

fn broker_time() -> Setting {
    let why = "retention, the maximum age of events and lag depend on the broker's clock";
    setting("message.timestamp.type", Rule::Exactly, "LogAppendTime", why)
}

fn large_messages() -> Setting {
    let why = "the largest record of the pipeline must fit";
    setting("max.message.bytes", Rule::AtLeast, MAX_MESSAGE_BYTES, why)
}

/// Returns the contracts of the events topic, the dead-letter topic and the control topic.
pub fn topics(events: &str, control: &str, partitions: i32, replicas: Replicas) -> [TopicContract; 3] {
    let contract = |name: &str, partitions, retention_ms: i64| TopicContract {
        name: name.to_owned(),
        partitions,
        settings: vec![
            not_compacted(),
            setting("retention.ms", Rule::Exactly, retention_ms, "records must be kept exactly this long"),
            setting("retention.bytes", Rule::Exactly, -1, "retention must depend on time alone"),
            setting("segment.ms", Rule::AtMost, SEGMENT_MS, "retention only removes whole segments"),
            large_messages(),
            setting(
                "min.insync.replicas",
                Rule::Exactly,
                replicas.min_insync,
                "this many replicas must have every acknowledged record (PIPELINE_MIN_INSYNC_REPLICAS)",
            ),
        ],
    };
    let mut events_contract = contract(events, partitions, TOPIC_RETENTION_MS);
    events_contract.settings.push(broker_time());
    let dead_letters_contract = contract(&dead_letter_topic(events), 1, DEAD_LETTER_RETENTION_MS);
    [events_contract, dead_letters_contract, contract(control, 1, CONTROL_RETENTION_MS)]
}

/// Returns the settings that a running processor depends on: those of the events topic and of the dead-letter topic.
pub fn needed_to_run(events: &str, rows_expire: bool) -> [TopicContract; 2] {
    let mut settings = vec![not_compacted(), broker_time()];
    if rows_expire {
        let why = "a record must be deleted before the row that detects its copies expires (store.ttl)";
        settings.push(setting("retention.ms", Rule::AtMost, TOPIC_RETENTION_MS, why));
    }
    let dead_letters = vec![not_compacted(), large_messages()];
    let contract = |name: String, settings| TopicContract { name, partitions: 0, settings };
    [contract(events.to_owned(), settings), contract(dead_letter_topic(events), dead_letters)]
}

impl Rule {
    fn holds(self, found: &str, required: &str) -> bool {
        let number = |text: &str| text.parse().map(|n: i64| if n < 0 { i64::MAX } else { n });
        match (self, number(found), number(required)) {
            (Rule::Exactly, _, _) => found == required,
            (Rule::AtMost, Ok(found), Ok(required)) => found <= required,
            (Rule::AtLeast, Ok(found), Ok(required)) => found >= required,
            _ => false,
        }
    }

    fn requirement(self) -> &'static str {
        match self {
            Rule::Exactly => "must be",
            Rule::AtMost => "must be at most",
            Rule::AtLeast => "must be at least",
        }
    }
}

impl TopicContract {
    /// Returns one line for each difference, followed by the command that corrects the settings. `factor` is the
    /// required number of replicas; `None` skips that check.
    pub fn differences(&self, found: &FoundTopic, factor: Option<i32>, brokers: &str) -> Vec<String> {
        let topic = &self.name;
        let mut lines = Vec::new();
        if let Some(factor) = factor.filter(|factor| *factor != found.factor) {
            lines.push(format!(
                "topic `{topic}`: has {} replicas, must have {factor} (PIPELINE_REPLICATION); \
                 change it with kafka-reassign-partitions.sh",
                found.factor
            ));
        }
        let mut wrong = Vec::new();
        for Setting { name, value, rule, why } in &self.settings {
            let current = found.settings.get(*name).map_or("unknown", String::as_str);
            if !rule.holds(current, value) {
                lines.push(format!(
                    "topic `{topic}`: {name} is {current}, {} {value}: {why}",
                    rule.requirement()
                ));
                wrong.push(format!("{name}={value}"));
            }
        }
        if !wrong.is_empty() {
            lines.push(format!(
                "to correct it, run: kafka-configs.sh --bootstrap-server {brokers} --alter --entity-type topics \
                 --entity-name {topic} --add-config {}",
                wrong.join(",")
            ));
        }
        lines
    }
}

/// A keyspace as Cassandra describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FoundKeyspace {
    /// Whether writes go through the commit log.
    pub durable_writes: bool,
    /// Replication class, and replicas by datacenter.
    pub replication: BTreeMap<String, String>,
}

/// Returns one line for each difference in keyspace `name`. `factor` is the required number of replicas in
/// `datacenter`; `None` requires at least one.
pub fn keyspace_differences(
    name: &str,
    found: &FoundKeyspace,
    datacenter: &str,
    factor: Option<i32>,
) -> Vec<String> {
    let mut lines = Vec::new();
    if !found.durable_writes {
        lines.push(format!(
            "keyspace `{name}`: durable_writes is false, so acknowledged rows could be lost; to correct it, run: \
             ALTER KEYSPACE {name} WITH durable_writes = true"
        ));
    }
    let class =
        found.replication.get("class").map_or("unknown", |class| class.rsplit('.').next().unwrap_or(class));
    // The number of transient replicas follows a slash.
    let number = |text: &String| text.split('/').next().and_then(|n| n.parse::<i32>().ok());
    let copies = found.replication.get(datacenter).and_then(number).unwrap_or(0);
    let required = factor.unwrap_or(copies.max(1));
    if class != "NetworkTopologyStrategy" || copies != required {
        let mut others: Vec<String> = found
            .replication
            .iter()
            .filter(|(key, _)| *key != "class" && *key != datacenter && class == "NetworkTopologyStrategy")
            .map(|(key, value)| format!(", '{key}': '{value}'"))
            .collect();
        others.insert(0, format!("'{datacenter}': '{required}'"));
        lines.push(format!(
            "keyspace `{name}`: is replicated by {class} with {copies} replicas in datacenter {datacenter}, \
             must be replicated by NetworkTopologyStrategy with {required} (PIPELINE_REPLICATION); \
             to correct it, run: ALTER KEYSPACE {name} WITH replication = \
             {{'class': 'NetworkTopologyStrategy', {}}}, then nodetool repair --full {name}",
            others.concat()
        ));
    }
    lines
}

/// Returns a warning if `min.insync.replicas` is below the default for the topic's number of replicas.
pub fn weak_durability(topic: &str, found: &FoundTopic) -> Option<String> {
    let default_min_insync = Replicas::default_min_insync(found.factor);
    let min_insync = found.settings.get("min.insync.replicas")?.parse::<i32>().ok()?;
    (min_insync < default_min_insync).then(|| {
        format!(
            "topic `{topic}` has {} replicas, but min.insync.replicas is {min_insync}; set it to {default_min_insync}, \
             so that the failure of one broker cannot lose an acknowledged record",
            found.factor
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Replicas = Replicas { factor: 1, min_insync: 1 };

    fn as_created(contract: &TopicContract, factor: i32) -> FoundTopic {
        let settings = contract.settings.iter().map(|s| (s.name.to_owned(), s.value.clone())).collect();
        FoundTopic { factor, settings }
    }

    fn check(change: (&str, &str), expected: &[&str]) {
        let [events, ..] = topics("t", "c", 6, ONE);
        let mut found = as_created(&events, 1);
        found.settings.insert(change.0.to_owned(), change.1.to_owned());
        let lines = events.differences(&found, Some(1), "h:9092");
        let text = lines.join("\n");
        assert_eq!(lines.len(), if expected.is_empty() { 0 } else { 2 }, "{text}");
        for part in expected {
            assert!(text.contains(part), "`{part}` is not in {text}");
        }
    }

    #[test]
    fn each_differing_setting_is_reported_with_the_command_that_corrects_it() {
        check(("retention.ms", "604800000"), &[]);
        check(
            ("retention.ms", "1000"),
            &[
                "topic `t`: retention.ms is 1000, must be 604800000",
                "kafka-configs.sh --bootstrap-server h:9092 --alter --entity-type topics --entity-name t --add-config \
                 retention.ms=604800000",
            ],
        );
        check(
            ("cleanup.policy", "compact,delete"),
            &["is compact,delete, must be delete", "compaction may remove"],
        );
        check(("message.timestamp.type", "CreateTime"), &["must be LogAppendTime"]);
        check(("retention.bytes", "1000000"), &["retention.bytes is 1000000, must be -1"]);
        check(("segment.ms", "1000"), &[]);
        check(("segment.ms", "604800000"), &["must be at most 86400000"]);
        check(("max.message.bytes", "8388608"), &[]);
        check(("max.message.bytes", "1048588"), &["must be at least 4194304"]);
        check(("min.insync.replicas", "2"), &["min.insync.replicas is 2, must be 1"]);
    }

    #[test]
    fn all_differences_are_reported_at_once() {
        let [events, dead_letters, control] = topics("t", "c", 6, Replicas { factor: 3, min_insync: 2 });
        for contract in [&events, &dead_letters, &control] {
            assert_eq!(contract.differences(&as_created(contract, 3), Some(3), "h"), [""; 0]);
        }
        let lines = events.differences(&as_created(&dead_letters, 1), Some(3), "h");
        let parts = [
            "has 1 replicas, must have 3",
            "retention.ms",
            "message.timestamp.type is unknown",
            "to correct it",
        ];
        assert_eq!(lines.len(), parts.len(), "{lines:#?}");
        for (line, part) in lines.iter().zip(parts) {
            assert!(line.contains(part), "`{part}` is not in `{line}`");
        }
    }

    #[test]
    fn a_running_processor_requires_fewer_settings_than_init() {
        let check = |rows_expire: bool, change: (&str, &str), differs: bool| {
            let [full, ..] = topics("t", "c", 6, ONE);
            let mut found = as_created(&full, 1);
            found.settings.insert(change.0.to_owned(), change.1.to_owned());
            let [events, _] = needed_to_run("t", rows_expire);
            let lines = events.differences(&found, None, "h");
            assert_eq!(!lines.is_empty(), differs, "{change:?}: {lines:?}");
        };
        check(true, ("min.insync.replicas", "2"), false);
        check(true, ("retention.ms", "1000"), false);
        check(true, ("retention.ms", "-1"), true);
        check(true, ("retention.ms", "1209600000"), true);
        check(false, ("retention.ms", "-1"), false);
        check(false, ("cleanup.policy", "compact"), true);
        check(false, ("message.timestamp.type", "CreateTime"), true);
    }

    #[test]
    fn a_keyspace_with_different_replication_is_reported_with_the_statement_that_corrects_it() {
        let found = |class: &str, factors: &[(&str, &str)]| FoundKeyspace {
            durable_writes: true,
            replication: std::iter::once(("class", class))
                .chain(factors.iter().copied())
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
        };
        let network = "org.apache.cassandra.locator.NetworkTopologyStrategy";
        let check = |found: &FoundKeyspace, factor: Option<i32>, expected: &[&str]| {
            let text = keyspace_differences("k", found, "dc1", factor).join("\n");
            assert_eq!(text.is_empty(), expected.is_empty(), "{text}");
            for part in expected {
                assert!(text.contains(part), "`{part}` is not in {text}");
            }
        };
        check(&found(network, &[("dc1", "1")]), Some(1), &[]);
        check(&found(network, &[("dc1", "3"), ("dc2", "3")]), Some(3), &[]);
        check(&found(network, &[("dc1", "3")]), None, &[]);
        check(
            &found(network, &[("dc1", "1"), ("dc2", "2")]),
            Some(3),
            &[
                "1 replicas in datacenter dc1",
                "with 3",
                "{'class': 'NetworkTopologyStrategy', 'dc1': '3', 'dc2': '2'}",
            ],
        );
        check(
            &found(network, &[("dc2", "3")]),
            None,
            &["0 replicas in datacenter dc1", "'dc1': '1', 'dc2': '3'"],
        );
        let simple = "org.apache.cassandra.locator.SimpleStrategy";
        check(&found(simple, &[("replication_factor", "1")]), Some(1), &["by SimpleStrategy", "'dc1': '1'}"]);
        let volatile = FoundKeyspace { durable_writes: false, ..found(network, &[("dc1", "1")]) };
        check(&volatile, None, &["durable_writes is false", "WITH durable_writes = true"]);
    }

    #[test]
    fn a_topic_that_could_lose_records_with_one_failed_broker_gets_a_warning() {
        let default_min_insync = [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)];
        for (factor, min_insync) in default_min_insync {
            assert_eq!(Replicas::default_min_insync(factor), min_insync);
        }
        let found = |factor, min_insync: &str| FoundTopic {
            factor,
            settings: [("min.insync.replicas".to_owned(), min_insync.to_owned())].into(),
        };
        assert_eq!(weak_durability("t", &found(1, "1")), None);
        assert_eq!(weak_durability("t", &found(3, "2")), None);
        assert!(weak_durability("t", &found(3, "1")).is_some_and(|text| text.contains("is 1; set it to 2")));
    }
}
